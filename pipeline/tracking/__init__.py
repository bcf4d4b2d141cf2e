"""The only importer of mlflow: trackers and the model registry."""
