"""Side-by-side measurements, each contestant in a child process: `python -m bench apply`, `merge` and `train`."""
