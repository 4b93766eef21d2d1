"""The agreement of trainings with different seeds, as a guide to settings."""
