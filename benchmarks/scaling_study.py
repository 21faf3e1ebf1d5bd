"""Does drawing many images and choosing help? Held-out prompts of the world of shapes, judged from pixels: JSON, table, plot.

    python benchmarks/scaling_study.py --out runs/scaling                                   # all of it
    python benchmarks/scaling_study.py --out runs/scaling --only draw --device cuda         # needs the model
    python benchmarks/scaling_study.py --results runs/scaling/results.jsonl --only analyse  # needs results.jsonl alone
    … --json docs/figures/scaling.json --markdown docs/figures/scaling-study.md --plot docs/figures/scaling.png --into docs/scaling.md
    python benchmarks/scaling_study.py --records FILE … --tune FILE …                       # the searches: study_search.py

Drawing (study_drawing.py) runs `scale t2i`: 4 x 8 images per prompt, latent questions, siglip reward. Then it reads every
picture: the judge from its pixels, the model's questions again in image mode, further rewards whose weights are given. The
results go to results.jsonl, one line per prompt. If it is stopped, the same command continues; so does one with more --prompts.

Analysis (study_analysis.py) computes, for every metric, what would have been kept if only the first 4, 8, 12 or 32 images had
been drawn. Intervals are 95 %, by bootstrap over prompts. Errors removed: 1 - (share of wrong images among the kept) / (among
all drawn).

With --records, nothing is drawn: policies of search are replayed from records of study_records.py, as study_search.py does it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import study_search
from benchmarks.bench import write_between_marks, write_json
from benchmarks.study_analysis import analyse
from benchmarks.study_drawing import PER_KIND, draw
from benchmarks.study_tables import markdown, plot, summary
from scale_rae.errors import ScaleRAEError


def main() -> None:
    """Draws, analyses, prints, and writes the files that the options name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="folder of the experiment")
    parser.add_argument("--results", type=Path, help="results file (default: results.jsonl in --out)")
    parser.add_argument("--only", choices=("draw", "analyse"), help="one half of the study")
    parser.add_argument("--model-path", default="shapes")
    parser.add_argument("--prompts", type=int, default=6 * PER_KIND)
    parser.add_argument("--n-samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--solver", default="ab2")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--batch-size", type=int, help="images drawn at once (default: as scale t2i)")
    parser.add_argument("--device")
    parser.add_argument("--devices", help="one worker each; cuda:0,cuda:0,cuda:0 are three on one GPU")
    parser.add_argument("--dtype")
    parser.add_argument("--judges", type=int, default=2, help="processes that judge pictures")
    parser.add_argument("--imagereward", help="folder with ImageReward's weights, to study that reward too")
    parser.add_argument("--pickscore", help="folder with PickScore's weights")
    study_search.add_options(parser)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--plot", type=Path, help="draw the plot here")
    parser.add_argument("--into", type=Path, help="put a summary between this page's marks")
    args = parser.parse_args()
    args.results = args.results or args.out / "results.jsonl"
    if not 1 <= args.prompts <= 6 * PER_KIND:
        parser.error(f"--prompts {args.prompts}: must be 1 to {6 * PER_KIND}")
    try:
        if args.records:
            study_search.write(study_search.analyse(args.records, args.tune, args.seconds, args.measured_on), args)
            return
        if args.only != "analyse":
            draw(args)
        if args.only == "draw":
            return
        figures = analyse(args.results)
        text = markdown(figures)
        print(text)
        write_json(args.json, figures)
        if args.markdown:
            args.markdown.write_text(text)
        if args.plot:
            plot(figures, args.plot)
        if args.into:
            folder = args.into.parent
            more = [f"[All metrics]({os.path.relpath(args.markdown, folder)})."] if args.markdown else []
            picture = (
                [f"![Correct images and errors removed]({os.path.relpath(args.plot, folder)})"] if args.plot else []
            )
            write_between_marks(args.into, "study", summary(figures, "\n\n".join(more + picture)))
    except ScaleRAEError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
