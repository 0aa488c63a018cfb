"""What this process and this job find: at present the versions of what is installed. Knows nothing of the rest."""
