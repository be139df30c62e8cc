"""The checks, by what they look at; each yields findings that `truedag.tracer.audit.catalogue` explains."""
