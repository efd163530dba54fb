"""recollect: sequence models that remember.

Importing this package imports neither torch nor anything else heavy; import what you need from its rooms:
``recollect.layers``, ``recollect.models``, ``recollect.tasks``, ``recollect.envs``, ``recollect.recipes``.
"""

__version__ = "0.1.0"
