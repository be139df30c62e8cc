"""The folder that recorded programs have first on PYTHONPATH, for the processes that they start."""
