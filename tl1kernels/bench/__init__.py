"""The command `tl1kernels bench`, and what it shares with the benchmarks in bench/."""
