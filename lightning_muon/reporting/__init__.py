"""A run's logs as pictures: one page to mail, and images and a layout for TensorBoard."""
