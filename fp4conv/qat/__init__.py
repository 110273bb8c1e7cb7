"""Quantisation-aware training. The only room that imports torch, transformers, trl, peft, accelerate and modelopt.

Nothing imports it but the commands `qat` and `calibrate`, which do so when they run.
"""
