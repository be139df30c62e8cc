"""The native recorder: its C++ sources, and how they are built and loaded."""
