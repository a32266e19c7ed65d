"""Fine-tuning on dense prediction: configs of MMDetection and MMSegmentation, our options, MMEngine's runner.

Only ``options`` is imported before the command's arguments are read; the rest needs the ``detection`` extra.
"""
