"""Somebody's drawing: parsed in a child process, read by a grammar that says how sure it is."""
