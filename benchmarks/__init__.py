"""Speed, memory and quality, measured: run a file as `python benchmarks/<file>.py --help` from a checkout.

Commands: gpu.py (published sizes on made-up weights), cpu.py (a model on this CPU), train.py (fine-tuning), serve.py (load on a
server), geneval.py (GenEval's evaluator), peaks.py (memory of each residency), quantized.py (accuracy of each quantisation),
solvers.py (error of each solver), scaling_study.py (does choosing help), study_records.py, study_search.py and study_seconds.py
(which policy of search), two_gpus.py (one device against two).

What they share: bench.py (timing, figures, tables), made_up.py and made_tokenizer.py (networks and checkpoints with made-up
weights). The stages of gpu.py are in gpu_*.py; scaling_study.py draws by study_drawing.py, both studies compute and plot by
study_analysis.py and study_tables.py.
"""
