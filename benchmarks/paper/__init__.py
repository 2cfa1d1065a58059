"""The experiments of the MetaOptimize paper; docs/mathematics.md says what the methods compute."""
