"""Several hosts and a slow link: what each way to train puts on the wire, and what a step takes."""
