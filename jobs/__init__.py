"""Runnable combinations of the packages: benchmarks, launchers for clusters and set-up scripts.

Nobody imports this package, but for `tokenlabels bench` inside its commands.

bench/                  what the benchmarks compare with
annotate_array.sbatch   a Slurm job array that labels ImageNet, one part of the shards per job, without Ray
install_pillow_simd.sh  replaces Pillow by pillow-simd in the active environment, and proves that it works
"""
