"""One module a paper: the list of stages that takes it from input to report."""
