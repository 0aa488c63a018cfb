"""What the exit code of a process means; docs/faults.md says what to do about each.

0 is success: done, or stopped as asked, with a checkpoint. An unexpected error has Python's code, 1.
"""

EXIT_DIFFERENT = 1
"""`megadiff compare` has found a difference, `megadiff verify` damage, `megadiff doctor --cluster` something wrong."""
EXIT_USAGE = 2
"""The command, its settings or its files are wrong; the same command will fail again."""
EXIT_NON_FINITE = 3
"""Loss or gradient is no longer a number."""
EXIT_HUNG = 4
"""A rank made no progress, here or elsewhere in the job."""
EXIT_NO_DATA = 5
"""A micro-batch did not come in time."""
EXIT_RERUN_ELSEWHERE = 16
"""A result has to be computed on another node to be understood (Megatron's EXIT_CODE_RESUME_TO_DISAMBIGUATE)."""
EXIT_RESULT_REJECTED = 17
"""A result was rejected, and it is known whose fault it was (Megatron's EXIT_CODE_FAILED_ON_RESULT_VALIDATION)."""
EXIT_INTERRUPTED = 130
"""By a second Ctrl-C, without a checkpoint."""
