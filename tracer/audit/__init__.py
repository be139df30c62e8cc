"""The audit: what a graph, a drawing or a claim shows of a strategy, check by check.

A subject (`subject.py`) is read from a dataset (`recorded.py`), from somebody's drawing (`drawing/`) or from a claim;
an expectation (`expectation.py`) is plain data that whoever knows the deployment makes; the checks (`checks/`) compare
the two, and `report.py`, `sarif.py` and `marking.py` say what came out.
"""
