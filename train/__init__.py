"""Training: typed configuration, data, the loop, the resumable state of a run, and its logs.

``vicinal train --help`` (the same as ``python -m vicinal.train --help``) lists every option.
"""
