"""Side-by-side measurements against the host, each in a child process: `python -m bench apply`, `python -m bench train`."""
