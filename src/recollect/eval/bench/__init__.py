"""What ``recollect bench`` measures, and how."""
