"""What every experiment shares: settings, run folders, jobs, pools, tuning, statistics, tables."""
