"""Small trainings from scratch that show what each part of the papers does, on real data.

    python -m benchmarks.small_scale comparison long_tail ablations --data_root DATA --output_dir runs/small_scale

Every run has the same encoder, data, number of samples and schedule; see `plan.py` for what differs. A run that is
finished is not repeated, so the command may be stopped and started again. Tables and pictures go to
`benchmarks/results/small_scale/`.
"""
