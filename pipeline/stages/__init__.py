"""One function a stage: settings and inputs in, a typed artefact out."""
