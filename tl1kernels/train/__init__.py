"""The paper's experiments: the same network, every regularizer, many seeds.

data.py        the data sets: their authors' files, their splits
networks.py    the networks
recipes.py     which network, optimizer and grid goes with which data set
run.py         one training run: a `Setting` in, a result file out
experiment.py  many runs in parallel, resumable: the search on the validation split, the final runs
report.py      tables and findings from result files
figures.py     pictures from result files
command.py     `tl1kernels train`
chosen/        what the search chose, per data set; the command that made a file stands in it
"""
