"""Fine-tuning on dense prediction: configs of MMDetection and MMSegmentation, our options, MMEngine's runner.

Before the command's arguments are read, only ``command`` and ``options`` are imported; the rest needs the
``detection`` extra.
"""
