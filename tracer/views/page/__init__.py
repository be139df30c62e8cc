"""The interactive page of a graph: one HTML file that opens from disk, and the data that it shows."""

from truedag.tracer.views.page.writing import Page, write_page

__all__ = ["Page", "write_page"]
