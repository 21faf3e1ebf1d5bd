"""Test-time scaling: draw many images, let model and reward score them, keep the best.

settings       everything that decides an experiment's files    experiment      what its JSON files say
records        a batch's record, sealed by a checksum           store           reads and writes its folder; in
local_files    a folder, or                                     object_store    a bucket
batches        draws and scores one batch                       waves           adaptive searches of some prompts
worker         draws and writes prompts on one device           worker_process  a worker in a process of its own
joining        holds a worker's models to the experiment        scoring         adds a reward to what is drawn
events         what a run reports                               launch          one run: checks, plan, outcome
local          launcher: one worker per device                  ranks           launcher: processes of torchrun or SLURM
ray_cluster    launcher: workers on a Ray cluster               reader          reads an experiment that may be a stranger's
select         ranks and keeps                                  replacing       replaces result folders whole
report, sheet  show it                                          plots           the report's plots
"""
