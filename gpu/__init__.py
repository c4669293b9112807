"""All checks for a few minutes on a machine with a GPU (``make gpu``), and their rehearsal without a GPU."""
