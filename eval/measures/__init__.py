"""What eval.report compares before and after a run.

Read: held_out (the run's own rows), harness (benchmarks), differences (paired, with intervals), rendering.
"""
