"""The command line: parsed strictly, and checked before torch is imported.

In: argv. Out: the dataclasses of utils/arguments.py, filled, or one line that says what is wrong.
Must not import: train, merge; and no torch, so that a mistake costs a second.
Read: finetune (all of it in order), parser, strict_parser, legacy (flags of 2023), hints (flags of other
trainers), trainer_flags, checks, trackers.
"""
