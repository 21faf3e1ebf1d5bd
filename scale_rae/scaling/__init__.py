"""Test-time scaling: draw many images, let the model score its latents and a reward its pictures, keep the best.

settings       everything that decides an experiment's files    experiment      what is recorded of it
store          its files: whole, locked, resumable; in          local_files     a folder, or
                                                                object_store    a bucket
batches        draws and scores one batch                       worker          draws and writes prompts on one device
joining        holds a worker's models to the experiment        worker_process  a worker in a process of its own
events         what a run reports                               launch          what a run is: checks, plan, outcome
local          launcher: one worker per device                  ranks           launcher: processes of torchrun or SLURM
ray_cluster    launcher: workers on a Ray cluster               select          ranks and keeps; report, sheet show it
"""
