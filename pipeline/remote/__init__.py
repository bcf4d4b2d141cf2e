"""Cluster jobs: what is sent, what travels with it, and the commands that submit, follow and stop it."""
