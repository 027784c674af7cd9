"""A training job that goes on with fewer machines."""
