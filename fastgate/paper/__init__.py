"""The paper's tables and figures: what they print, the runs behind them, and our numbers next to theirs."""
