"""How the work is shared out between processes."""
