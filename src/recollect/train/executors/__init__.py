"""Where the runs of a face-off run: in this process, in processes of their own, or on a Ray cluster."""
