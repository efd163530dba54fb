"""The report of a face-off: what is read, how it is drawn and said, and where it is written (``write``)."""
