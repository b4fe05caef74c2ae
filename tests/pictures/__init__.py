"""The pictures of the documents, made from a real run: `python -m tests.pictures` (`make pictures`)."""
