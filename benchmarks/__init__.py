"""Speed, memory and quality, measured: run a file as `python benchmarks/<file>.py --help` from a checkout.

Commands: gpu.py (published sizes on made-up weights), cpu.py (a model on this CPU), serve.py (load on a server), solvers.py
(error of each solver), scaling_study.py (does choosing help), two_gpus.py (one device against two).

What they share: bench.py (timing, figures, tables), made_up.py and made_tokenizer.py (networks and checkpoints with made-up
weights). The stages of gpu.py are in gpu_*.py, the study's analysis and tables in study_*.py.
"""
