"""The reference of the settings, made from their models: a JSON Schema and a page of Markdown."""
