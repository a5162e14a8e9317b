"""Recipes: functions that return an `ExperimentConfig`, and the command line that runs them."""
