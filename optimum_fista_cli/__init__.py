"""The command line. It lies beside the package, whose import loads torch and transformers: help stays quick."""
