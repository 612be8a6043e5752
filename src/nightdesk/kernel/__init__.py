"""The machinery: one loop in lanes, one door for events, a switch between background and opportunity.

Comes from: sources/, venues/, desk.py
Goes to: tasks/, stores/, telemetry/
"""
