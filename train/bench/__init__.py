"""train/bench"""
