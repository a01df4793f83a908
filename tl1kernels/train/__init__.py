"""The paper's experiments: the same network, every regularizer, many seeds.

data.py        the data sets and their splits
networks.py    the networks
run.py         one training run: a `Setting` in, a result file out
experiment.py  many runs in parallel, resumable: the search on the validation split, the final runs
report.py      tables, curves and pictures from result files
chosen/        what the search chose, per data set; the command that made a file stands in it
"""
