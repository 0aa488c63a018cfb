"""What this process and this job find: versions, and this process's share of its node. Knows nothing of the rest."""
