"""The networks of Emu2: visual encoder, connector, language model. They describe computation and nothing else."""
