def walk(query, key, value, rate, state, totals):
    raise NotImplementedError
