"""Runnable combinations of the packages: benchmarks, launchers for clusters and set-up scripts.

Nobody imports this package, but for `tokenlabels bench` and `tokenlabels train` inside their commands.

train.py                one training run: ``python -m jobs.train NAME``, also under torchrun
recipes/, config.py     runs as functions that return a configuration; overrides.py is `--set`
build.py, preflight.py  from a configuration to model and loaders, and whether the data belong together
analyse.py              what trained models have learned: ``python -m jobs.analyse tokenizer RUN --images ...``
train_demo.py           the same on generated scenes
experiments/            studies of several runs
bench/                  what the benchmarks compare with
annotate_array.sbatch   a Slurm job array that labels ImageNet, one part of the shards per job, without Ray
install_pillow_simd.sh  replaces Pillow by pillow-simd in the active environment, and proves that it works
"""
