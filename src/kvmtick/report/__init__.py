"""What a trace says of its ticks: findings, tables, pictures, exports."""
