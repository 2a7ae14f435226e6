"""Many runs of one base config: a search space, seeds for every point, intervals at the end."""
